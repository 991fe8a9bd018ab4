"""What is inside a CLIP model, how it drives a prediction, and whether that is a shortcut."""
