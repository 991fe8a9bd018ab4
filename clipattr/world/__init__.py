"""The planted world: rendered scenes with captions whose concepts and shortcuts are known."""
