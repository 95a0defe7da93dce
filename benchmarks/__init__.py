"""What things cost, always as ratios within one interleaved run."""
