import Testing

@testable import ApertusKit

/// Who waits for an answer gets it or is let go.
@Suite struct LineTests {
    /// Whoever leaves the line is handed out, though others are stopped at that very moment.
    @Test func nobodyIsLostWhileOthersStop() async {
        for _ in 0 ..< 20 {
            let line = Line()
            let asks = (0 ..< 3_000).map { _ in
                let continuation = AsyncThrowingStream<Piece, any Error>.makeStream().continuation
                return Ask(
                    options: .greedy, onPrefill: nil,
                    begin: { throw CancellationError() }, end: { _ in }, continuation: continuation)
            }
            for ask in asks { line.join(ask) }
            let stopping = Task.detached { for ask in asks { ask.stop(.cancelled) } }
            var taken = 0
            while line.isBusy {
                taken += line.takeStopped().count
                await Task.yield()
            }
            await stopping.value
            #expect(taken == asks.count)
        }
    }
}
