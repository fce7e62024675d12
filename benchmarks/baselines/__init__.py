"""Models that Tidal is measured against."""
