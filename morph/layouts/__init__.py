"""Where a checkpoint file keeps its softmax attention, one file per architecture."""
