"""What setup.py needs to compile the native modules; not part of the installed package."""
