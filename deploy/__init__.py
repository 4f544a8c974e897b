"""From an image to a running RunPod endpoint, and back: `python -m deploy <command> <worker>`."""
