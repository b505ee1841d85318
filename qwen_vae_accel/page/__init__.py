"""What people read of a result: one type, :class:`~qwen_vae_accel.page.sheet.Sheet`, as Markdown, on a terminal and as HTML."""
