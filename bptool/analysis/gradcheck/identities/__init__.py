"""Identities of backpropagation: equations between gradients that hold in every model that has such parts."""
