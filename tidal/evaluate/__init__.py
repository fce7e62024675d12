"""Figures of a trained model: right answers, bits per byte, what a cut prompt costs, how much it repeats itself."""
