"""Speed: what a training step costs, measured pair by pair in one process."""
