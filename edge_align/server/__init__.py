"""The local server: OpenAI's and Ollama's protocols, a profile per request, and feedback it learns from."""
