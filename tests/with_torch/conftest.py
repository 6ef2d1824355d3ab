import torch

torch.set_num_threads(1)  # the networks of these tests are too small to share
