"""One parameter's step: a recipe names a row for each slot, the layout sizes the state, the step runs the slots in order."""
