"""What is measured while a run trains, how it is logged and drawn, and when something is wrong."""
