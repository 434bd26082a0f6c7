import ApertusCore

/// What one run produced, and what it took.
public struct Outcome: Sendable, Equatable {
    /// Why an answer ended.
    public enum FinishReason: String, Sendable {
        /// The model or a stop text ended it.
        case stop
        /// It reached `maxTokens` or the end of the context.
        case length
        /// The model asks for tools; see `Conversation.answer(with:)`.
        case toolCalls = "tool_calls"
        /// Someone ended it, or memory ran short.
        case cancelled
    }

    /// Text, thoughts and tool calls.
    public internal(set) var answer = Answer()
    public internal(set) var finishReason = FinishReason.cancelled
    /// All that were drawn, a stop id included.
    public internal(set) var tokenIDs: [Int] = []
    public internal(set) var promptTokenIDs: [Int] = []
    /// Tokens of the prompt that had been computed before.
    public internal(set) var reusedPromptTokens = 0
    /// The draw's; with it the same prompt gives the same answer again.
    public internal(set) var seed: UInt64 = 0
    /// Calls that were no valid JSON; what the model wrote is text.
    public internal(set) var malformedToolCalls = 0
    /// The stop text that ended the answer.
    public internal(set) var stopText: String?
    /// From the start of the run, in seconds; 0 before there is a token.
    public internal(set) var secondsToFirstToken = 0.0
    /// From the first token to the last, in seconds.
    public internal(set) var decodingSeconds = 0.0
    /// The most memory that was held, in bytes: MLX's, on Linux the process's.
    public internal(set) var peakMemory = 0

    /// The message that goes on with a conversation. Calls are in it if the answer ends with them, and
    /// with them the thoughts, which go on when the results are there.
    public var message: Message {
        let calls = finishReason == .toolCalls ? answer.calls : []
        return .assistant(answer.text, thoughts: calls.isEmpty ? "" : answer.thoughts, calls: calls)
    }

    /// Prompt tokens computed in a second; 0 if there was nothing to time.
    public var prefillTokensPerSecond: Double {
        rate(promptTokenIDs.count - reusedPromptTokens, secondsToFirstToken)
    }
    /// Tokens drawn in a second after the first one; 0 likewise.
    public var decodeTokensPerSecond: Double { rate(tokenIDs.count - 1, decodingSeconds) }

    private func rate(_ count: Int, _ seconds: Double) -> Double {
        count > 0 && seconds > 0 ? Double(count) / seconds : 0
    }
}
