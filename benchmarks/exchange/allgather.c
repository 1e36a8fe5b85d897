//go:build ignore

// This program measures MPI_Allgather. Its arguments are the rounds of a warm-up, the rounds after
// it, and the bytes from each process. Process 0 prints p50 and p99 of a round, in µs.

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int ascending(const void *a, const void *b) {
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

int main(int argc, char **argv) {
	MPI_Init(&argc, &argv);
	int rank, size;
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &size);
	if (argc != 4) {
		fprintf(stderr, "allgather: want WARM ROUNDS BYTES, have %d arguments\n", argc - 1);
		MPI_Abort(MPI_COMM_WORLD, 2);
	}
	int warm = atoi(argv[1]), rounds = atoi(argv[2]), bytes = atoi(argv[3]);
	char *row = malloc(bytes), *table = malloc((size_t)bytes * size);
	double *took = malloc(sizeof *took * rounds);
	if (!row || !table || !took) {
		fprintf(stderr, "allgather: no memory for %d processes with %d bytes, %d rounds\n", size, bytes, rounds);
		MPI_Abort(MPI_COMM_WORLD, 1);
	}
	for (int i = 0; i < warm + rounds; i++) {
		memset(row, (rank + i) & 127, bytes);
		double began = MPI_Wtime();
		MPI_Allgather(row, bytes, MPI_CHAR, table, bytes, MPI_CHAR, MPI_COMM_WORLD);
		if (i >= warm)
			took[i - warm] = (MPI_Wtime() - began) * 1e6;
		for (int r = 0; r < size; r++)
			if (table[(size_t)r * bytes] != ((r + i) & 127)) {
				fprintf(stderr, "allgather: process %d has wrong bytes of process %d\n", rank, r);
				MPI_Abort(MPI_COMM_WORLD, 1);
			}
	}
	qsort(took, rounds, sizeof *took, ascending);
	if (rank == 0)
		printf("%f %f\n", took[rounds / 2], took[(long)rounds * 99 / 100]);
	MPI_Finalize();
	return 0;
}
