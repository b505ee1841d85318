"""``python -m qwen_vae_accel.cli``."""

from qwen_vae_accel.cli.app import main

main()
