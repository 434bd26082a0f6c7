import ApertusKit
import Foundation
import Testing

/// The embedded model in 4 bits, and what Python answers with it: `python -m tests.swift_fixtures
/// OUT`.
enum KitFixtures {
    struct Answered: Decodable, Sendable {
        let prompt, text: String
        let token_ids: [Int]
    }
    struct Expected: Decodable, Sendable {
        let tokens: Int
        let questions: [Answered]
        let raw, second_turn: Answered
        let keys: [String: [String]]
        /// Lines of chat's `/help` that are about commands.
        let help: [String]
    }

    static var folder: URL {
        get throws {
            guard let path = ProcessInfo.processInfo.environment["APERTUS_FIXTURES"] else {
                throw ApertusError(
                    .usage, "APERTUS_FIXTURES names no folder; see Contributing in docs/swift.md")
            }
            return URL(fileURLWithPath: path, isDirectory: true).appendingPathComponent("answered")
        }
    }
    static var model: URL { get throws { try folder.appendingPathComponent("model") } }
    static var expected: Expected {
        get throws {
            try JSONDecoder().decode(
                Expected.self,
                from: Data(contentsOf: folder.appendingPathComponent("expected.json")))
        }
    }

    static func load() async throws -> Apertus { try await Apertus(folder: model) }

    static func greedy() throws -> AnswerOptions {
        var options = AnswerOptions.greedy
        options.maxTokens = try expected.tokens
        return options
    }

    /// A copy of the model's folder that a test may change.
    static func copy() throws -> URL {
        let copy = FileManager.default.temporaryDirectory
            .appendingPathComponent("apertus-\(UUID().uuidString)")
        try FileManager.default.copyItem(at: model, to: copy)
        return copy
    }
}

func text(of pieces: AsyncThrowingStream<Piece, any Error>) async throws -> String {
    var text = ""
    for try await piece in pieces { text += piece.text }
    return text
}

/// How much is compared: the first number where `APERTUS_NIGHTLY` is set, as for the fixtures, else the
/// second.
func sized(_ nightly: Int, _ daily: Int) -> Int {
    ProcessInfo.processInfo.environment["APERTUS_NIGHTLY"]?.isEmpty == false ? nightly : daily
}
