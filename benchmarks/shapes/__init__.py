"""The shapes world: the data set, training recipe and scorer of the bundled model."""
