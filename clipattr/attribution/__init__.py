"""Why a prediction came out: functions of a score, activations and sparse codes."""
