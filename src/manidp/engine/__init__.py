"""The engine: a plan and machine code made for one checkpoint, which computes only what each image keeps."""
