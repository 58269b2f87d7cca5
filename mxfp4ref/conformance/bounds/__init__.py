"""How far a correct kernel may be off in mode "bounded", and which ids and weights a correct router may give."""
