"""The colours of all pictures."""

INK, GREY, TRAIN, HELDOUT = "#2b2b2b", "#8a8a8a", "#4f86c0", "#c1442e"
# Of several curves or models, chosen so that colour-blind readers can tell them apart too.
CURVES = (HELDOUT, TRAIN, "#3f8f5f", "#8a5fa8", "#b8860b", "#5f6f7f")
