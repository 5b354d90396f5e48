"""What the two papers compare with and report. Programs: python -m papers.NAME --help"""
