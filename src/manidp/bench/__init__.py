"""Time beside accuracy: the engine and other runtimes on the same models and images, in one interleaved run."""
