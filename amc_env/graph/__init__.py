"""What a network is: its layers, coupled channels, operations, and how its tensors are cut."""
