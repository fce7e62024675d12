"""Generation and scoring with a trained model."""
