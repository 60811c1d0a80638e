"""What only a table or a picture in results/ needs: tables of runs, fronts, studies, benchmarks, votes."""
