"""What the operations share: checks of tensors, packed documents, decays, gradients made by hand, torch.compile."""
