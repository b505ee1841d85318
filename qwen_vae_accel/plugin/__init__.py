"""Into a diffusers pipeline and out of it again: handle, patch, dispatch, pre- and post-processing, parking."""
