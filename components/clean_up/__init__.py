"""The exit handler: whatever has become of the run, nothing of it goes on."""
