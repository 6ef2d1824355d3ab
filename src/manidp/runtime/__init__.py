"""Running a checkpoint with numpy and llvmlite alone: a plain reference and an engine that skips closed channels."""
