"""HTTP and text on Ray Serve around the engine; touches no tensor."""
