"""What of a model trains, by which method, and at which learning rate."""
