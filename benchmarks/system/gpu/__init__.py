"""What holds on a GPU: joint steps of models of full size, drawn at random."""
