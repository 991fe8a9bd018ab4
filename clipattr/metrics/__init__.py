"""Numbers with their intervals: pure functions, and torchmetrics where they are streamed."""
