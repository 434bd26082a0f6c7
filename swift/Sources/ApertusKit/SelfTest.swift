import ApertusCore
import ApertusMLX
import Foundation

/// Whether this device tokenizes, renders and computes as the machine that wrote the folder.
///
/// It compares with the folder's golden prompts, and with its golden answers where
/// `apertus-mlx verify --golden` has written them: the likeliest tokens after each prompt, computed
/// in float32 from the same weights. Where a token was not clearly ahead of the second, the
/// comparison of its answer ends: there the rounding of 16 bits may choose otherwise.
public struct SelfTest: Sendable, Equatable {
    /// The first thing that came out otherwise.
    public struct Difference: Sendable, Equatable, CustomStringConvertible {
        /// What was compared: the ids of a text or of a conversation, or an answer.
        public enum Part: String, Sendable { case text, conversation, answer }

        public let part: Part
        /// Of the conversation; the text where it has no name.
        public let name: String
        /// Which token, counted from 0.
        public let position: Int
        /// Nil: there is none.
        public let expected: Int?
        public let found: Int?

        public var description: String {
            let what =
                switch part {
                case .text: "the tokenizer cuts it otherwise"
                case .conversation: "the chat format writes it otherwise"
                case .answer: "the model answers otherwise; this device computes wrong"
                }
            func id(_ token: Int?) -> String { token.map { "token \($0)" } ?? "no token" }
            return "\(name.prefix(60).debugDescription): \(what): at \(position) \(id(found)), "
                + "expected \(id(expected))"
        }
    }

    /// What was compared: texts and conversations by their ids, and tokens of answers.
    public internal(set) var texts = 0
    public internal(set) var conversations = 0
    public internal(set) var answers = 0
    public internal(set) var answerTokens = 0
    /// Nil: everything is as it should be.
    public internal(set) var difference: Difference?
    /// Of the answers that were computed.
    public internal(set) var seconds = 0.0

    /// Whether arithmetic was looked at: the folder has golden answers.
    public var coversArithmetic: Bool { difference?.part == .answer || answers > 0 }
}

extension Apertus {
    /// Compare tokenizer, chat format and arithmetic with what the folder says; ends at the first
    /// difference.
    ///
    /// - Parameter onProgress: is told the share that is done, from 0 to 1.
    /// - Throws: `ApertusError`: of kind `notFound` where the folder has no golden prompts,
    ///   `cancelled` when the task is.
    public func selfTest(onProgress: (@Sendable (Double) -> Void)? = nil) async throws -> SelfTest {
        guard let prompts = try GoldenPrompts(folder: folder) else {
            throw ApertusError(
                .notFound,
                "\(folder.filePath): no \(GoldenPrompts.fileName); only folders made by "
                    + "apertus-mlx convert have one")
        }
        var result = SelfTest()
        try compare(prompts, &result)
        guard result.difference == nil, let answers = try GoldenAnswers(folder: folder) else {
            return result
        }
        let clock = ContinuousClock()
        let begun = clock.now
        for (index, answer) in answers.answers.enumerated() {
            if Task.isCancelled { throw ApertusError(.cancelled, "cancelled") }
            onProgress?(Double(index) / Double(answers.answers.count))
            let count = answer.clearCount(answers.clearMargin)
            let found = try await engine.continuation(
                of: answer.promptIds.map(Int.init), count: count)
            result.answers += 1
            result.answerTokens += count
            if let place = answer.firstDifference(
                found.map(Int32.init), clearMargin: answers.clearMargin)
            {
                result.difference = .init(
                    part: .answer, name: answer.name, position: place,
                    expected: Int(answer.ids[place]),
                    found: place < found.count ? found[place] : nil)
                break
            }
        }
        let (whole, parts) = (clock.now - begun).components
        result.seconds = Double(whole) + Double(parts) * 1e-18
        onProgress?(1)
        return result
    }

    private func compare(_ prompts: GoldenPrompts, _ result: inout SelfTest) throws {
        for text in prompts.texts {
            result.texts += 1
            result.difference = Self.difference(
                .text, text.text, engine.folder.tokenizer.encode(text.text), text.ids)
            if result.difference != nil { return }
        }
        for conversation in prompts.conversations {
            // The system block may hold the day on which the folder was written.
            let written = engine.folder.tokenizer.decode(conversation.ids)
            let format = try engine.folder.chatFormat(
                day: Self.day(in: written) ?? ChatFormat.today())
            let found = try format.prompt(
                conversation.messages, tools: conversation.tools, thinks: conversation.thinks)
            result.conversations += 1
            result.difference = Self.difference(
                .conversation, conversation.name, found, conversation.ids)
            if result.difference != nil { return }
        }
    }

    private static func difference(
        _ part: SelfTest.Difference.Part, _ name: String, _ found: [Int32], _ expected: [Int32]
    ) -> SelfTest.Difference? {
        guard found != expected else { return nil }
        let place = zip(found, expected).prefix { $0 == $1 }.count
        return .init(
            part: part, name: name, position: place,
            expected: place < expected.count ? Int(expected[place]) : nil,
            found: place < found.count ? Int(found[place]) : nil)
    }

    /// The first day in ISO 8601 that a text holds.
    private static func day(in text: String) -> String? {
        text.firstMatch(of: /\d{4}-\d{2}-\d{2}/).map { String($0.output) }
    }
}
