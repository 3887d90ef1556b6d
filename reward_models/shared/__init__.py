"""Parts that several reward models share: pictures, checkpoints, templates, text generation, endpoints.

Nothing here is a reward. A reward model is a file in the folder above; its short name is the file's
name.
"""
