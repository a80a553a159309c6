"""Identify the neurons of C. elegans from their activity and the known connectome."""
