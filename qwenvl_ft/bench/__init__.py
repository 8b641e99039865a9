"""What the library costs: time, memory and work of its parts, measured or computed by ``qwenvl-ft bench``."""
