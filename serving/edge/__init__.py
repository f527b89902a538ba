"""Models for phones, browsers and small machines: ONNX, ExecuTorch, and a page that runs one in a browser."""
