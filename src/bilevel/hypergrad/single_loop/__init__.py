"""One loop over minibatches: the inner parameters and the linear system move along with meta."""
