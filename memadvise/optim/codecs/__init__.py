"""State in fewer bits: how a float32 moment is held between steps. One file a codec; see :mod:`.codec`."""
