"""Weight files of any layout: what is in them, of which network it is, and where each parameter lies."""
