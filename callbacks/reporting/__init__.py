"""Tables, published results and model cards."""
