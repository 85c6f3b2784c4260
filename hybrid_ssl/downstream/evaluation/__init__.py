"""What frozen features are worth: k-NN, linear and attentive probes, logistic regression, few labels, retrieval.

One pass of the encoder over training and test images (`features.py`) gives all that the protocols ask for; each
protocol is one file. Test labels are read once, at the end: whatever is chosen (a learning rate, a penalty) is chosen
on a part of the training images. Work is dealt out to processes in pieces that do not depend on their number, so
that one process and several give the same numbers.
"""
