import ApertusCore

/// One answer that somebody asked for: it waits, is computed, or is over.
final class Ask: Sendable {
    enum End: Sendable { case cancelled, memoryShort }

    /// What an answer is drawn after, and how its tokens are read.
    struct Prompt {
        let ids: [Int32]
        let parser: AnswerParser
    }

    let options: AnswerOptions
    /// Is told how many tokens of the prompt are done.
    let onPrefill: (@Sendable (Int) -> Void)?
    /// Called once, when the turn comes: makes the prompt.
    let begin: @Sendable () throws -> Prompt
    /// Called once after `begin` has succeeded, with what there is of the answer.
    let end: @Sendable (Outcome) -> Void

    private let continuation: AsyncThrowingStream<Piece, any Error>.Continuation
    private let stopped = Locked<End?>(nil)

    init(
        options: AnswerOptions, onPrefill: (@Sendable (Int) -> Void)?,
        begin: @escaping @Sendable () throws -> Prompt,
        end: @escaping @Sendable (Outcome) -> Void,
        continuation: AsyncThrowingStream<Piece, any Error>.Continuation
    ) {
        (self.options, self.onPrefill, self.begin, self.end) = (options, onPrefill, begin, end)
        self.continuation = continuation
    }

    /// Whether to end behind the next token.
    var isStopped: Bool { stopped.with { $0 != nil } }

    /// End it behind the token, or part of the prompt, that is being computed.
    func stop(_ why: End) { stopped.with { $0 = $0 ?? why } }

    func yield(_ pieces: [Piece]) {
        for piece in pieces { continuation.yield(piece) }
    }

    /// Nothing follows.
    func finish(_ error: (any Error)? = nil) {
        if let error {
            continuation.finish(throwing: error)
        } else if stopped.with({ $0 == .memoryShort }) {
            continuation.finish(
                throwing: ApertusError(
                    .resource,
                    "the device ran short of memory, so the answer was stopped and caches were "
                        + "emptied; close other apps, or load with a smaller context"))
        } else {
            continuation.finish()
        }
    }
}

/// Asks in the order in which they came, of which one is computed at a time.
final class Line: Sendable {
    private struct State {
        var waiting: [Ask] = []
        var current: Ask?
    }
    private let state = Locked(State())

    func join(_ ask: Ask) { state.with { $0.waiting.append(ask) } }

    /// The one whose turn it is; nil if none waits.
    func next() -> Ask? {
        state.with { state in
            state.current = state.waiting.isEmpty ? nil : state.waiting.removeFirst()
            return state.current
        }
    }

    func leave() { state.with { $0.current = nil } }

    /// Have all end as soon as they can.
    func stopAll(_ why: Ask.End) {
        let all = state.with { $0.waiting + [$0.current].compactMap { $0 } }
        for ask in all { ask.stop(why) }
    }

    /// Let go those who wait but are to end anyway, in their order.
    func takeStopped() -> [Ask] {
        state.with { state in
            // Each is asked once: others may stop it meanwhile, and whoever is let go is finished.
            var stopped: [Ask] = []
            var waiting: [Ask] = []
            for ask in state.waiting {
                if ask.isStopped { stopped.append(ask) } else { waiting.append(ask) }
            }
            state.waiting = waiting
            return stopped
        }
    }

    /// Whether an answer is being computed or waits.
    var isBusy: Bool { state.with { $0.current != nil || !$0.waiting.isEmpty } }
}
