"""Private: what `SelectedBatches` is made of."""
