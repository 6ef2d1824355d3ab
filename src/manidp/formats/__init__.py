"""What files hold models: checkpoints, MindSpore .ckpt files, and the ways between them."""
