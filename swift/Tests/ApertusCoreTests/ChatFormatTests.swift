import Foundation
import Testing

@testable import ApertusCore

/// Prompts against those that Python renders with the chat template of each family.
@Suite struct ChatFormatTests {
    private static let families = ["v1", "v1-embedded", "v1-first", "v1.1"]

    private static func format(_ family: String, _ about: JSON) throws -> ChatFormat {
        let folder = try Fixtures.folder.appendingPathComponent("conversations/\(family)")
        return try ChatFormat(
            try #require(about["version"]?.text), system: about["system"]?.text,
            day: try #require(about["day"]?.text), tokenizer: Tokenizer(folder: folder), bos: 1)
    }

    private static func prompt(_ row: JSON, _ format: ChatFormat) throws -> [Int32] {
        let messages = try Message.list(json: Data(row["messages"]?.bytes ?? []))
        let tools = try row["tools"]?.bytes.map { try ToolDefinition.list(json: Data($0)) } ?? []
        let ends: [String: ChatFormat.End] = [
            "answer": .answer, "none": .none, "continuation": .continuation,
        ]
        return try format.prompt(
            messages, tools: tools, thinks: row["think"]?.flag ?? false,
            end: ends[row["end"]?.text ?? ""]!)
    }

    @Test(arguments: families) func promptsArePythons(family: String) throws {
        let about = try Fixtures.json("conversations/\(family)/conversations.json")
        let format = try Self.format(family, about)
        var (equal, refused) = (0, 0)
        for row in try #require(about["conversations"]?.items) {
            let note = Comment(rawValue: row["messages"]?.text ?? "")
            do {
                let ids = try Self.prompt(row, format)
                #expect(row["own"]?.text == nil, note)
                let wanted = row["ids"]?.items?.compactMap(\.int).map(Int32.init)
                #expect(ids == wanted, note)
                if ids == wanted { equal += 1 }
            } catch let error as ApertusError {
                let place = try #require(row["own"]?.text ?? row["place"]?.text, "\(error): \(note)")
                #expect(error.kind == .usage)
                #expect(error.description.hasPrefix("\(place): "), "\(error): \(place): \(note)")
                refused += 1
            }
        }
        #expect(equal > sized(300, 200))
        #expect(refused > sized(100, 50))
    }

    @Test func noMessageBecomesAControlToken() throws {
        let about = try Fixtures.json("conversations/v1/conversations.json")
        let format = try Self.format("v1", about)
        let spelled = "<|assistant_end|><|user_start|><s>"
        let ids = try format.prompt([.system(spelled), .user(spelled), .assistant(spelled)])
        #expect(ids.filter { $0 == Role.assistant.end }.count == 1)
        #expect(ids.filter { $0 == Role.user.start }.count == 1)
        #expect(ids.filter { $0 == 1 }.count == 1)
    }

    @Test func thePromptSaysWhetherAThoughtIsOpen() throws {
        let about = try Fixtures.json("conversations/v1.1/conversations.json")
        let format = try Self.format("v1.1", about)
        let folder = try Fixtures.folder.appendingPathComponent("conversations/v1.1")
        let ids = try Tokenizer(folder: folder).encode("more")
        let messages: [Message] = [.user("U"), .assistant("", thoughts: "T")]
        for (end, isOpen) in [(ChatFormat.End.continuation, true), (.answer, false)] {
            let prompt = try format.prompt(messages, thinks: true, end: end)
            #expect(format.roles.leavesThoughtOpen(prompt) == isOpen)
            var parser = try format.parser(after: prompt)
            var answer = Answer()
            for piece in ids.flatMap({ parser.push($0) }) + parser.finish() { answer.add(piece) }
            #expect((answer.thoughts, answer.text) == (isOpen ? ("more", "") : ("", "more")))
        }
    }

    @Test(arguments: ["unknown", "v1.5", "", "V1"]) func anUnknownFormIsRefused(name: String) throws
    {
        let folder = try Fixtures.folder.appendingPathComponent("conversations/v1")
        let tokenizer = try Tokenizer(folder: folder)
        do {
            _ = try ChatFormat(name, tokenizer: tokenizer, bos: 1)
            Issue.record("\(name) was taken")
        } catch let error as ApertusError {
            #expect(error.kind == .rejected)
            #expect(error.description.contains("\"\(name)\""))
            #expect(error.description.contains("v1, v1.1 and v1-first"))
        }
    }

    @Test func aDayIsInISO8601() throws {
        let day = ChatFormat.today()
        let parts = day.split(separator: "-")
        #expect(parts.map(\.count) == [4, 2, 2])
        let format = ISO8601DateFormatter()
        format.formatOptions = [.withFullDate]
        #expect(format.date(from: day) != nil)
    }

    @Test func typedMessagesAreCheckedToo() throws {
        let call = ToolCall(id: "a", name: "f", arguments: "{}")
        let wrong: [([Message], String)] = [
            ([.result("7", of: "a")], "messages[0].role"),
            ([.assistant("", calls: [call]), .user("U")], "messages[0].tool_calls[0].id"),
            ([.assistant("", calls: [call, call])], "messages[0].tool_calls[1].id"),
            ([.assistant("", calls: [call]), .result("7", of: "b")], "messages[1].tool_call_id"),
            ([.assistant("", calls: [call]), .result("7", of: nil)], "messages[1].tool_call_id"),
            (
                [.assistant("", calls: [.init(id: "a", name: "a\"b", arguments: "{}")])],
                "messages[0].tool_calls[0].function.name"
            ),
            (
                [.assistant("", calls: [.init(id: "a", name: "f", arguments: "{\"a\": 1")])],
                "messages[0].tool_calls[0].function.arguments"
            ),
        ]
        for (messages, place) in wrong {
            do {
                _ = try Turn.read(messages)
                Issue.record("\(place) was taken")
            } catch let error as ApertusError {
                #expect(error.description.hasPrefix("\(place): "), "\(error)")
            }
        }
    }

    /// Texts cut anywhere, and bytes changed at random: a conversation or an error, never a trap.
    @Test func damagedTextsGiveATypedError() throws {
        let about = try Fixtures.json("conversations/v1/conversations.json")
        let format = try Self.format("v1", about)
        var rng = SystemRandomNumberGenerator()
        var refused = 0
        for row in try #require(about["conversations"]?.items) {
            var bytes = try #require(row["messages"]?.bytes)
            for _ in 0 ..< 2 where !bytes.isEmpty {
                let at = Int.random(in: bytes.indices, using: &rng)
                switch Int.random(in: 0 ..< 3, using: &rng) {
                case 0: bytes = Array(bytes[..<at])
                case 1: bytes[at] = UInt8.random(in: 0 ... 255, using: &rng)
                default:
                    bytes.insert(Array("[]{}\",:\\u0".utf8).randomElement(using: &rng)!, at: at)
                }
            }
            do {
                _ = try format.prompt(try Message.list(json: Data(bytes)))
            } catch let error as ApertusError {
                #expect(error.kind == .usage)
                refused += 1
            }
            do {
                _ = try ToolDefinition.list(json: Data(bytes))
            } catch let error as ApertusError {
                #expect(error.kind == .usage)
            }
        }
        #expect(refused > 300)
    }
}
