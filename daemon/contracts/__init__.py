"""What programs may rely on, made from the frames and the row models: JSON Schema, AsyncAPI and TypeScript."""
