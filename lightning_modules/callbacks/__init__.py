"""Lightning callbacks: checkpoints, learning curves, pictures, the papers' numbers, and so on."""
