"""The backends' declarations: one file each, named as in the registry."""
