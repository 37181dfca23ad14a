"""Step 2: train with DiLoCo."""
